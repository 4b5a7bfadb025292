"""What actome costs, as ratios to the bare model in one process: ``python -m benchmarks``; see docs/benchmarks.md.

- `timing`    interleaved rounds, medians and quartiles            - `subjects`  the models and inputs
- `row`       one line of the table, with its limit                - `peers`     the same work by other libraries
- `table`     the table on the terminal and in the documentation   - `machine`   what it was measured on

Suites, each with ``run(options) -> rows``: `forward`, `patterns`, `generation`, `panels`, `watching`, `fixed`,
`imports`; and, only when they are named, `measures`, a breakdown of a panel, `similarity`, CKA beside published
packages, and `store`.
"""
