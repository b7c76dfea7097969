"""The rooms behind train.py and evaluate.py."""
