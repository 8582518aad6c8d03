"""Does an exchange between networks help, for this model and data? Plan, runs, statistics, report.

From a plan that is written down before anything runs to a verdict in plain sentences.
"""
