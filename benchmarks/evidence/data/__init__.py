"""Real data and pretrained weights of the tasks, all from installed packages."""
