"""Train image classifiers with TempBalance and FARMS: `python -m train.cifar --tb farms`."""
