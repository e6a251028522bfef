"""Chains of thought (CoTs) for preference CSVs that have none: `python -m collect.collect_cot`."""
