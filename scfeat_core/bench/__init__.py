"""``scfeat bench``: how long each stage takes, beside other features and beside what the machine could do at best."""
