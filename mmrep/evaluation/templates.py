"""Prompt templates that come with mmrep, a few for each language; ``{c}`` stands for the class."""

from __future__ import annotations

TEMPLATES: dict[str, list[str]] = {
    "ar": ["صورة {c}.", "صورة فوتوغرافية {c}.", "رسم {c}."],
    "de": ["ein Foto: {c}.", "ein Bild: {c}.", "eine Zeichnung: {c}."],
    "el": ["μια φωτογραφία: {c}.", "μια εικόνα: {c}.", "ένα σχέδιο: {c}."],
    "en": ["a photo of a {c}.", "a picture of a {c}.", "a drawing of a {c}."],
    "es": ["una foto de {c}.", "una imagen de {c}.", "un dibujo de {c}."],
    "fr": ["une photo de {c}.", "une image de {c}.", "un dessin de {c}."],
    "hi": ["{c} की एक तस्वीर।", "{c} का एक चित्र।", "{c} का एक रेखाचित्र।"],
    "it": ["una foto di {c}.", "un'immagine di {c}.", "un disegno di {c}."],
    "ja": ["{c}の写真。", "{c}の画像。", "{c}の絵。"],
    "ko": ["{c} 사진.", "{c} 이미지.", "{c} 그림."],
    "nl": ["een foto van {c}.", "een afbeelding van {c}.", "een tekening van {c}."],
    "pl": ["zdjęcie: {c}.", "obraz: {c}.", "rysunek: {c}."],
    "pt": ["uma foto de {c}.", "uma imagem de {c}.", "um desenho de {c}."],
    "ru": ["фото: {c}.", "изображение: {c}.", "рисунок: {c}."],
    "tr": ["bir {c} fotoğrafı.", "bir {c} resmi.", "bir {c} çizimi."],
    "zh": ["{c}的照片。", "{c}的图片。", "{c}的图画。"],
}
