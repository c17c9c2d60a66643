"""``docs/results.md`` and ``docs/results/*.md`` as text, of result files; ``benchmarks.results_page`` writes them.

``evidence`` says what a result file must tell of where its figures come from, ``sections`` which page shows which
benchmark, ``detail`` makes those pages, ``figures`` and ``claims`` choose one figure a claim, ``front`` makes the page
that a reader sees first.  Nothing here measures.
"""
