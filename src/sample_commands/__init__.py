"""The commands of sample.py. Nothing here imports torch before a command runs, so help is quick."""
