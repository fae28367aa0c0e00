"""The HTML report: what is read of runs and evaluations, and the page that shows it."""
