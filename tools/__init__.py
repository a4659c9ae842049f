"""Programs for developers: `python -m tools.aot` and others. They may use the package, never the tests."""
