"""What files hold, by their names alone. Imports nothing, so that asking costs nothing."""

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif",
        ".jp2",
    }
)  # fmt: skip
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"})
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".m2ts",
    }
)  # fmt: skip
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"}
#: beside everything that starts with a dot
STRAY_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}


def is_stray(name: str) -> bool:
    """Whether a file or folder is hidden or the system's."""
    return name.startswith(".") or name.lower() in STRAY_NAMES
