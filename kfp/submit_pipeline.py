"""Submit a run to Vertex AI; the same as `rlhf vertex submit`.

Usage: `python kfp/submit_pipeline.py --config configs/vertex_tldr.yaml --output_dir
gs://my-bucket/rlhf/one --vertex.location europe-west4 --dry_run`.
"""

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["vertex", "submit", *sys.argv[1:]]))
