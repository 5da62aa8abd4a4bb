"""The tools are a package, so that no other package of this name on a machine takes their place."""
