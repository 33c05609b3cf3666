"""The report of a run or a table as one HTML file that needs no server and no network (docs/report.md).

`subject` finds the runs in a folder, `data` and the modules that it uses turn them into JSON, `html` puts that JSON,
the style and the scripts of ``static/`` into one file. `markdown` is the short form for a pull request.
"""
