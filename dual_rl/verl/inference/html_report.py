"""A page to look at what the model thought: of a benchmark run, or of the generations that training logged.

    python inference.py ... --report out.html
    python -m verl.inference.html_report RUN/generations.jsonl --output out.html --data val.csv
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.data.answers import JUDGEMENT_KEY, extract_judgement, parse_annotation
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import JUDGE_PROMPT
from verl.inference.bench_csv import Bench, BenchRow
from verl.inference.html_page import Item, Page, Row, Table, View, merge_scores, relative_url, write_page
from verl.inference.journal import Journal
from verl.inference.report import MAIN_LABELS, describe_interval
from verl.inference.report_charts import build_calibration, build_histogram, build_means, sigmoid
from verl.inference.scale import RewardScale
from verl.trainer.config import DataConfig
