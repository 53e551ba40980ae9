"""The tests and their helpers: a package, so that no other package called `tests` takes its place."""
