import sys

from modeling_deepseek_r1.cli import main

raise SystemExit(main(["quantize", *sys.argv[1:]]))
