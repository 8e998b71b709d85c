"""CPPO inside verl, for those who outgrow one node: views as further rows of verl's own engines. Imports no TRL."""
