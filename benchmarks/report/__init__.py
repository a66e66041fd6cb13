"""docs/results.md and its plots, written from the records. Nothing here measures anything."""
