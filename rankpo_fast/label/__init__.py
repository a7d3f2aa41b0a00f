"""Labels from records: rules that say which items fit which queries, run as joins.

    rules.yaml ──> RuleFile                    rule_file, predicates, templates
    records    ──> queries.parquet,            records: read and checked by DuckDB, a row a record
                   items.parquet               with its text, its id and the columns the rules need
    both       ──> pairs.parquet               plan, pairs: what matches, and what all rules but one
    pairs      ──> rows, evaluation sets       draw, write
               ──> report.md, report.json      report

Records that agree in every column of the rules match the same records: they are a *group*. The
rules are evaluated once for each pair of groups, and a pair of groups counts as often as it has
records, so that rules of few values (region, rank, field) cost no more on a million records than on
a thousand. Where every record is a group of its own this is the plain join.

Queries x items is never built. Every rule that is an equality in disguise says so by its keys:
`same` is one, `in` and `overlap` are equal elements, `within` is equal cells of a grid, and
`ordinal_distance` equal buckets. `plan` writes the rules as alternatives, each a join on the keys
of several rules at once; what the keys let through, the rules themselves decide. Rules that no key
drives are refused, as are joins of more than `max_pairs` pairs, before they are run.

Draws (of positives beyond `max_positives`, of negatives) take a hash of seed and row numbers in
integer arithmetic, which DuckDB and Spark do alike: with one seed both write the same files. A draw
is a rank among a query's matches, found in the running sum of group sizes: nothing is listed in
order to be drawn from.
"""
