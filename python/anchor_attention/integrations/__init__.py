"""Anchor attention in models of other packages; none of these packages is needed to import this one."""
