"""Everything that a GPU has to report, in one command: `make gpu`. Each part is a module with a CSV file.

    tests.py      the tests marked `gpu`                                        gpu_tests.csv
    step.py       time, memory and kernels of training steps of ViT             gpu_step.csv
    growth.py     the same for growing numbers of mixed examples                gpu_growth.csv
    training.py   training runs on all of Fashion-MNIST                         gpu_training.csv
    tables.py     the tables of docs/gpu.md from these files

The parts need PyTorch, Transformers, Accelerate and pytest, and no network. kornia and torchvision are optional.
"""
