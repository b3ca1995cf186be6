"""Data sets, processors and models by the names a person gives them, made into a task for a comparison."""
