"""Other modalities than text: encoders, adapters to the text model's width, fusion at placeholders and the bridge."""
