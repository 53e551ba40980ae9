"""The declarations of families whose specs are checked without torch: one file each, with the name of the family.

A family without a file here declares its settings in its own file. Then a check of a spec imports that file.
"""
