"""The paper's figures and tables: `src/evaluate.py measure=paper`."""
