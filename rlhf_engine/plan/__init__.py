"""What a run costs before it is paid for: parameters, bytes, FLOPs and seconds, by arithmetic."""
