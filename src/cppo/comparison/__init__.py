"""`cppo compare`: methods x seeds x tasks from one start, as processes that never run twice, and their results.

`options`, `study` and `jobs` plan without torch, `pool` runs the processes, `cell` is one process. `finished` reads
their results, `results` and `comparisons` combine them, `tables` and `page` show them.
"""
