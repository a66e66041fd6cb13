"""Which suspects the suite is about: those of the small scale are kept in git, the full one needs a GPU."""

SMALL = ("resnet20",)
FULL = ("resnet18_cifar", "vgg16_bn_cifar", "mobilenet_v2_cifar")
