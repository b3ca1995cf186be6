"""Datasets, processors and models by name, combined into a task for training or a comparison."""
