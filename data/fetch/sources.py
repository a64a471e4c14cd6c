"""The data sets that can be fetched: where they lie, what they must be, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from data.storage import size


@dataclass(frozen=True)
class Source:
    """A data set: one JSON file, and pictures that lie in one folder of a server."""

    title: str
    json_name: str
    """what the JSON is called here"""
    json_url: str
    json_bytes: int
    json_sha256: str
    records: int
    pictures_url: str
    """the folder that holds the pictures, to which the name in a record is added"""
    pictures: int
    picture_bytes: int
    """of a picture, on average"""
    licence: str

    def told(self) -> str:
        """What it is and what may be done with it, for a person who is about to fetch it."""
        whole = size(self.json_bytes + self.pictures * self.picture_bytes)
        return (
            f"{self.title}: {self.records:,} records about {self.pictures:,} pictures,"
            f" about {whole} in all\n{self.licence}"
        )


SOURCES = {
    "llava-instruct-150k": Source(
        title="LLaVA-Instruct-150K, with pictures of COCO train2017",
        json_name="llava_instruct_150k.json",
        json_url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/"
        "9d451dc7629cfe0469f6ae4432b765cd603d5fcb/llava_instruct_150k.json",
        json_bytes=228_941_895,
        json_sha256="6b68bc5ca2bfd8a71119af0e8454929668ccda6a334955ccc95d114fc8d082fa",
        records=157_712,
        pictures_url="http://images.cocodataset.org/train2017/",
        pictures=81_479,
        picture_bytes=163_474,  # train2017.zip has 19,336,861,798 bytes and 118,287 pictures
        licence="licence: conversations CC BY 4.0, made with GPT-4 (OpenAI's terms of use hold);"
        " pictures as their owners on Flickr say, see https://cocodataset.org/#termsofuse",
    ),
}
