"""CPPO inside verl, for runs on many nodes: views are additional rows of verl's own engines. Imports no TRL."""
