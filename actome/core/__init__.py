"""The instrument: sites, families, taps, models, recordings, measures, clamps and text. It knows no method."""
