"""What several tests of the trainer share."""

from pathlib import Path

NO_FOLDER = Path("nowhere")
