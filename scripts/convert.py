import sys

from modeling_deepseek_r1.cli import main

raise SystemExit(main(["convert", *sys.argv[1:]]))
