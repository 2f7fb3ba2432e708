"""What cifar100.py and imagenet.py share: data, networks, published figures, and the run itself."""
