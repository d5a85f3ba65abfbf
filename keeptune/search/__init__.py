"""The search for settings: ranges and results of trials arrive; the next trials and the winner leave. No data here."""
