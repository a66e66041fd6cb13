"""Other serving frameworks with the same networks behind them, each in an environment of its own; started by benchmarks/serving/http.py."""
