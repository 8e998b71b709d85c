"""`cppo compare`: methods x seeds x tasks from one start, as processes that are never run twice, and what they show.

`options`, `study` and `jobs` plan without torch, `pool` runs the processes, `cell` is what each of them does,
`finished` reads what they leave, `results` and `comparisons` put it together, `tables` and `page` show it.
"""
