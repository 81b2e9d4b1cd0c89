"""`deepseek-r1 compose TEXT DESTINATION`: command line of `conversion.compose_checkpoint`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="text checkpoint: of this library, or one that convert takes")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to be made; it appears only when it is complete")
    parser.add_argument("--vision", metavar="CHECKPOINT", help="DINOv2, SigLIP or CLIP checkpoint, for images and videos")
    parser.add_argument("--audio", metavar="CHECKPOINT", help="Whisper checkpoint, whose encoder is used")
    parser.add_argument("--bridge-layers", type=int, nargs="+", metavar="N", help="layers that read the features again")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="images become squares of this side (default: 224)")
    parser.add_argument("--max-tiles", type=int, default=1, metavar="N", help="parts of a large image (default: 1 = none)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="of a video, equally spaced (default: all)")
    parser.add_argument("--use-audio-in-video", action="store_true", help="read a video's frames together with its sound")
    parser.add_argument(
        "--vision-downsampling", type=int, default=1, metavar="N", help="join squares of N x N patches (default: 1)"
    )
    parser.add_argument(
        "--audio-downsampling", type=int, default=4, metavar="N", help="join N positions of 20 ms each (default: 4)"
    )
    parser.add_argument("--no-gate", action="store_true", help="put features in the place of embeddings instead of mixing them")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at DESTINATION")


def run(args: argparse.Namespace) -> None:
    from ..conversion.compose import compose_checkpoint

    report = compose_checkpoint(
        args.text,
        args.destination,
        vision=args.vision,
        audio=args.audio,
        image_size=args.image_size,
        max_tiles=args.max_tiles,
        max_frames=args.max_frames,
        use_audio_in_video=args.use_audio_in_video,
        vision_downsampling=args.vision_downsampling,
        audio_downsampling=args.audio_downsampling,
        fusion=None if args.no_gate else {},
        bridge=args.bridge_layers,
        overwrite=args.overwrite,
    )
    print(report.summary())
