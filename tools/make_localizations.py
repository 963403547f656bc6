"""Writes localizations/*.json, which the WebUI offers as its languages, from the table of settings.

Usage: python tools/make_localizations.py [--check]. A text of the page without a translation here
is an error, so a new setting cannot be forgotten. The host translates a text that is equal to a
key, wherever it stands in the page.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib_klora.settings import FIELDS, NO_LORA  # noqa: E402 - needs the path

LANGUAGES = ("zh_CN", "ja_JP")
NAMES = {"K-LoRA"}
"""Not translated."""
OTHER_TEXTS = ("Preview selection", "Paper defaults", "Advanced", NO_LORA, "Clear analysis cache")

TRANSLATIONS = {
    "Use these settings. Off: two <klora:…> tags in the prompt still work, with the defaults "
    "from the Settings page.": (
        "使用这些设置。关闭时，提示词中的两个 <klora:…> 标签仍然有效，并采用设置页中的默认值。",
        "この設定を使います。オフでも、プロンプト内の 2 つの <klora:…> タグは"
        "設定ページの既定値で有効です。",
    ),
    "α: slope": ("α：斜率", "α：傾き"),
    "How fast it moves from subject to style.": (
        "从主体过渡到风格的快慢。",
        "主題から画風へ移る速さ。",
    ),
    "β: start": ("β：起点", "β：始点"),
    "Where it starts: less is more subject.": (
        "起始位置：越小越偏向主体。",
        "始まりの位置：小さいほど主題寄り。",
    ),
    "Scale": ("缩放函数", "スケール関数"),
    "S: subject, then style. S*: style, subject, style. none: no change.": (
        "S：先主体，后风格。S*：风格、主体、风格。none：不随时间变化。",
        "S：主題、次に画風。S*：画風、主題、画風。none：変化なし。",
    ),
    "Method": ("方法", "方式"),
    "How the two LoRAs are fused.": ("两个 LoRA 的融合方式。", "2 つの LoRA の融合方式。"),
    "Layers": ("层", "層"),
    "attention: the layers of the paper, everything else in the files is left out. all: every "
    "layer that the files have.": (
        "attention：论文中的层，文件中的其余部分不使用。all：文件中的所有层。",
        "attention：論文の層のみで、ファイルの他の部分は使いません。all：ファイルにあるすべての層。",
    ),
    "γ: balance": ("γ：平衡", "γ：バランス"),
    "Evens out files of different strength. paper: ratio of the sums (Eq. 9). authors: mean of "
    "the layers' ratios, as in the authors' program.": (
        "平衡强度不同的文件。paper：总和之比（式 9）。authors：各层比值的平均，与作者的程序相同。",
        "強さの違うファイルを揃えます。paper：総和の比（式 9）。"
        "authors：著者のプログラムと同じ、層ごとの比の平均。",
    ),
    "K multiplier": ("K 倍数", "K の倍率"),
    "K, the number of largest entries that speak for a layer, is this times rank × rank.": (
        "K（代表一层的最大元素个数）为该值乘以 秩 × 秩。",
        "K（層を代表する最大要素の数）は、この値 × ランク × ランク。",
    ),
    "Layers of one file": ("仅一方有的层", "片方だけの層"),
    "A layer that only one file has: keep its change all the time, or drop it.": (
        "只有一个文件具有的层：始终保留其改动，或舍弃。",
        "片方のファイルだけにある層：常に適用するか、捨てるか。",
    ),
    "Text encoder": ("文本编码器", "テキストエンコーダー"),
    "Apply both files' text encoder parts, as <lora:…> does.": (
        "与 <lora:…> 一样，应用两个文件的文本编码器部分。",
        "<lora:…> と同じく、両ファイルのテキストエンコーダー部分を適用します。",
    ),
    "Hires and img2img": ("高清修复与图生图", "高解像度補助と img2img"),
    "continue: start where the denoising strength starts. restart: start from the subject again.": (
        "continue：从重绘幅度对应的位置开始。restart：重新从主体开始。",
        "continue：ノイズ除去強度の位置から。restart：主題からやり直します。",
    ),
    "Content LoRA": ("内容 LoRA", "内容 LoRA"),
    "The subject's LoRA by name, instead of a tag in the prompt.": (
        "主体的 LoRA，代替提示词中的标签。",
        "主題の LoRA。プロンプトのタグの代わりに選びます。",
    ),
    "Style LoRA": ("风格 LoRA", "画風 LoRA"),
    "The style's LoRA by name, instead of a tag in the prompt.": (
        "风格的 LoRA，代替提示词中的标签。",
        "画風の LoRA。プロンプトのタグの代わりに選びます。",
    ),
    "Content weight": ("内容权重", "内容の重み"),
    "Weight of the content LoRA named here.": (
        "此处所选内容 LoRA 的权重。",
        "ここで選んだ内容 LoRA の重み。",
    ),
    "Style weight": ("风格权重", "画風の重み"),
    "Weight of the style LoRA named here.": (
        "此处所选风格 LoRA 的权重。",
        "ここで選んだ画風 LoRA の重み。",
    ),
    "Hires pass": ("高清修复阶段", "高解像度パス"),
    "as first pass: the scale, α and β above. own: those below.": (
        "as first pass：使用上面的缩放函数、α 和 β。own：使用下面的设置。",
        "as first pass：上のスケール関数、α、β を使用。own：下の設定を使用。",
    ),
    "Hires scale": ("高清修复缩放函数", "高解像度スケール関数"),
    "As Scale, for the hires pass.": (
        "同“缩放函数”，用于高清修复阶段。",
        "「スケール関数」の高解像度パス用。",
    ),
    "Hires α: slope": ("高清修复 α：斜率", "高解像度 α：傾き"),
    "As α, for the hires pass.": ("同 α，用于高清修复阶段。", "α の高解像度パス用。"),
    "Hires β: start": ("高清修复 β：起点", "高解像度 β：始点"),
    "As β, for the hires pass.": ("同 β，用于高清修复阶段。", "β の高解像度パス用。"),
    "Preview selection": ("预览选择图", "選択をプレビュー"),
    "Paper defaults": ("论文默认值", "論文の既定値"),
    "Advanced": ("高级", "詳細"),
    "Clear analysis cache": ("清除分析缓存", "解析キャッシュを消去"),
    NO_LORA: ("无（使用标签）", "なし（タグを使用）"),
}


def texts() -> list[str]:
    """Every text that a person sees in the accordion.

    Not the words to choose from, such as “all”: they are what the API takes, and the host would
    translate them wherever they stand in its own page.
    """
    found = dict.fromkeys(OTHER_TEXTS)
    for field in FIELDS:
        found |= dict.fromkeys((field.label, field.help))
    return [text for text in found if text not in NAMES]


def main() -> int:
    """Writes the files, or says with --check whether they are up to date."""
    wanted = texts()
    missing = [text for text in wanted if text not in TRANSLATIONS]
    stale = [text for text in TRANSLATIONS if text not in wanted]
    if missing or stale:
        print("not translated:", missing, "not in the page any more:", stale)
        return 1
    for i, language in enumerate(LANGUAGES):
        path = ROOT / "localizations" / f"{language}.json"
        words = {text: TRANSLATIONS[text][i] for text in wanted}
        content = json.dumps(words, ensure_ascii=False, indent=2) + "\n"
        if "--check" not in sys.argv:
            path.write_text(content, encoding="utf8")
        elif path.read_text(encoding="utf8") != content:
            print(f"{path} is not up to date: run this without --check")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
