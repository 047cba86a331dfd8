"""What a run tells: logs, figures, progress."""
