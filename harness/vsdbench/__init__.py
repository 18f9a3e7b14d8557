"""vsdbench: does training the drafter for this objective make decoding faster, by how much, and how sure are we?"""

__version__ = "0.1.0"
