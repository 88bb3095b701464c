"""Where rows come from: one reader for files of any format, sets of the Hub, and Python objects."""
