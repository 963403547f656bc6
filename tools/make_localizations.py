"""Writes localizations/*.json, which the WebUI offers as its languages, from the table of settings
and lib_klora/texts.py.

Usage: python tools/make_localizations.py [--check]. A text of the page without a translation here
is an error, so a new setting cannot be forgotten. The host translates a text that is equal to a
key, wherever it stands in the page.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib_klora import texts as page  # noqa: E402 - needs the path
from lib_klora.settings import FIELDS, NO_LORA  # noqa: E402

LANGUAGES = ("zh_CN", "ja_JP")
NAMES = {"K-LoRA"}
"""Not translated."""
OTHER_TEXTS = (
    page.PREVIEW, page.DEFAULTS, page.ADVANCED, NO_LORA, *page.HINT, page.ANALYSING,
    page.CLEAR_CACHE, page.COMPARE, page.COMPARE_WAYS, page.COMPARE_SEEDS, "subject", "style",
    page.STEP, page.CONTENT_SHARE, page.ALONE, page.AS_TABLE, page.MAP_HINT,
    *page.MAP_BLOCK_COLUMNS, *page.MAP_STEP_COLUMNS, *page.MAP_WORDS,
    "Refresh the LoRA lists",
    "K-LoRA: use as content. Again to remove; the other letter swaps the roles.",
    "K-LoRA: use as style. Again to remove; the other letter swaps the roles.",
)  # fmt: skip
SENTENCES = (
    page.cache_sentence(0, 1),
    page.not_cleared_sentence("x"),
    page.copies_sentence("x", ("x", "y")),
    # the reading of a selection map
    "Hires: 1 % content; 1 % both; above 1 % content; below 1 % content",
    "style takes over at step 2, content at step 3, style at step 4 of 5",
    "content takes over at step 2 of 5",
    "content has more layers in every step; style has more layers in every step",
    "content and style take turns, 7 times in 9 steps; every layer gets both in every step",
    "each LoRA predicts by itself in every step, and the two are averaged",
    "every step is content, style is never used",
    "every step is style, content is never used",
    "content in its block, style in its own, nothing else is applied",
    "1 % of content in the style's directions",
    "1 layer only in the content file; 2 layers only in the content file",
    "1 layer only in the style file; 2 layers only in the style file; no layer is in both files",
    # what was done
    "Subject “x”, style “y”.",
    "The prompt's <klora:…> tags are used, not the LoRAs named beside them.",
    "The first pass has K-LoRA, the hires pass does not.",
    "The steps before the refiner have K-LoRA, the refiner's do not.",
    "1 layer of “x” (such as y) does not fit this model and is left out.",
    page.NOT_EVERY,
    page.OFF,
    "2 layers of “x” (such as y) do not fit this model and are left out.",
    "1 layer of “x” (such as y) is of a type that K-LoRA cannot compare and is left out.",
    "2 layers of “x” (such as y) are of a type that K-LoRA cannot compare and are left out.",
    # what went wrong
    "No LoRAs are given: choose a content and a style LoRA, or write two <klora:NAME> tags.",
    "K-LoRA is switched on, but no LoRAs are given: write two <klora:NAME> tags, or name a content "
    "and a style LoRA.",
    "There is no LoRA “x”: check the spelling against the Lora tab, and press Refresh there if the "
    "file is new.",
    "K-LoRA needs exactly two <klora:…> tags, one for the subject and one for the style, but the "
    "prompt has 1 (“x”): add a second one.",
    "K-LoRA needs exactly two <klora:…> tags, one for the subject and one for the style, but the "
    "prompt has 3 (“x”, “y”, “z”): keep two; others can be <lora:…>.",
    "K-LoRA has a content LoRA but no style LoRA: name both, or neither and write two <klora:…> "
    "tags.",
    "K-LoRA has a style LoRA but no content LoRA: name both, or neither and write two <klora:…> "
    "tags.",
    "<klora:x:y>: “y” is no finite number: write a weight such as 0.8, or a role (content, style).",
    "<klora:x> and <klora:y> both have the role content: make one of them content and the other "
    "style.",
    "<klora:x> and <klora:y> both have the role style: make one of them content and the other "
    "style.",
    "The prompt has <klora:…> tags, but the K-LoRA accordion is off, and Settings → K-LoRA says "
    "that tags need it: switch one of the two on.",
    "Settings → K-LoRA: alpha is 0, but S* wraps around at alpha: set alpha above 0, or S.",
    "“x” does not fit this model: 1 of its 3 layers fit, and the others (such as y) have no "
    "counterpart that this WebUI can apply them to. Choose another file or checkpoint.",
    "“x” does not fit this model: it was made for SDXL, the checkpoint is Flux.1, and 0 of its 3 "
    "layers fit. Choose a LoRA for Flux.1, or a checkpoint for this one.",
    "“x” was made for Flux.1, and the checkpoint is Chroma: 2 of its 3 layers fit.",
    "“x” is for this model, but its layer names are in a spelling that this WebUI does not read "
    "(such as y, 0 of its 3 layers are read). Write it anew: “python -m lib_klora convert FILE "
    "OUT” in the extension's folder, or choose another file.",
    "“x” is for this model, but this WebUI drops the whole file for the 2 tensors in it that are "
    "no part of a layer (such as y). Write it anew without them: “python -m lib_klora convert "
    "--only-layers FILE OUT” in the extension's folder, or choose another file.",
    "1 layer of “x” (such as y) has rank zero: left out.",
    "2 layers of “x” (such as y) have rank zero: left out.",
    "“x” is a DoRA as PEFT saves it: its magnitudes (such as y) are not applied, by <lora:…> "
    "neither.",
    "2 tensors of “x” (such as y) are not used: the layers are applied without them, as by "
    "<lora:…>.",
    "2 LoRAs have the alias “x”: write the name of one of them, “y” or “z”.",
    "“x” and “y” have no layer in common, so there is nothing to choose: both are applied all the "
    "time.",
    "B-LoRA is for SDXL, and the checkpoint is Flux.1: choose another checkpoint or method.",
    "“x” has no layer in up_blocks.0.attentions.0, and B-LoRA applies nothing else of the content "
    "LoRA: swap the two if they are the wrong way round, or choose another file.",
    "“x” has no layer in up_blocks.0.attentions.1, and B-LoRA applies nothing else of the style "
    "LoRA: swap the two if they are the wrong way round, or choose another file.",
    "“x” has no layer in up_blocks.0.attentions.0, nor “y” in up_blocks.0.attentions.1, and B-LoRA "
    "applies nothing else: swap the two if they are the wrong way round, or choose another method.",
    "NP-LoRA leaves 1 layer of “x” (such as y) as in Direct merge, because not both files have "
    "LoRA factors there.",
    "NP-LoRA leaves 2 layers of “x” (such as y) as in Direct merge, because not both files have "
    "LoRA factors there.",
    "“x” and “y” hardly overlap (0.4 % of content in the style's directions), so this is nearly "
    "Direct merge.",
    "K-LoRA does not know this network: the 4 layers with attention in their names were taken to "
    "be its attention.",
    "The comparison of the two LoRAs was interrupted: generate again and it goes on where it "
    "stopped.",
    "The WebUI could not apply K-LoRA to every layer, most often because memory is full, so the "
    "picture is made without it: choose a smaller size, or generate again.",
    "The picture is made without K-LoRA, because another extension samples with a model of its own "
    "that has no LoRAs, or changes LoRAs between steps: switch that extension off.",
    "LoRA Composite needs two predictions in each step, and another extension calls the model in a "
    "way of its own: switch that extension off, or choose another method.",
    "The WebUI applies no LoRAs to the SD Unet “x”, so the picture is made without K-LoRA. To use "
    "it, choose None in Settings → Stable Diffusion → SD Unet.",
    # what a paste found
    "The LoRA “x” of this picture is now called “y”.",
    "The LoRA “x” of this picture (0123456789ab) is not here.",
    "“x” is not the file that this picture was made with (0123456789ab).",
    "This picture's parameters say “x”, which this version of K-LoRA does not know: it is left "
    "out.",
)
"""Sentences that a run or a preview makes, about any names and numbers. All others can be
translated in the same way; these are what people see most."""

TRANSLATIONS = {
    "Use these settings. Off: two <klora:…> tags in the prompt still work, with the defaults "
    "from the Settings page.": (
        "使用这些设置。关闭时，提示词中的两个 <klora:…> 标签仍然有效，并采用设置页中的默认值。",
        "この設定を使います。オフでも、プロンプト内の 2 つの <klora:…> タグは"
        "設定ページの既定値で有効です。",
    ),
    "α: slope": ("α：斜率", "α：傾き"),
    "How fast it moves from subject to style: higher means more style, sooner.": (
        "从主体过渡到风格的快慢：越大则风格越早、越强。",
        "主題から画風へ移る速さ：大きいほど早く、強く画風になります。",
    ),
    "β: start": ("β：起点", "β：始点"),
    "Where it starts: lower means more subject.": (
        "起始位置：越小越偏向主体。",
        "始まりの位置：小さいほど主題寄り。",
    ),
    # Not “Scale”: a slider of img2img has that name, and is translated with it.
    "Scale S(t)": ("缩放因子 S(t)", "スケール S(t)"),
    "S: subject, then style. S*: style, subject, style. share: the layers turn to style one after "
    "another, from one share to the other, in every pair. none: no change.": (
        "S：先主体，后风格。S*：风格、主体、风格。share：对任何一对文件，各层都按占比逐一转为风格。"
        "none：不随时间变化。",
        "S：主題、次に画風。S*：画風、主題、画風。share：どの組でも、設定した割合に沿って層が順に"
        "画風へ移ります。none：変化なし。",
    ),
    "Method": ("方法", "方式"),
    "How the two LoRAs are fused. K-LoRA: the LoRA whose largest entries weigh more. Direct merge: "
    "both LoRAs in every layer and step. LoRA Switch: content and style in turn, step by step. "
    "LoRA Composite: each predicts by itself and the two are averaged, which takes twice the time. "
    "Fixed selection: content while S(t) is below 1, then style. Random selection: content with "
    "probability 1/3, else style. Top-K without scale: K-LoRA with S(t) = 1. Without γ: K-LoRA "
    "with γ = 1. EST-LoRA: as K-LoRA, by the energy of all entries and the authors' γ. B-LoRA: "
    "SDXL only, content in up_blocks.0.attentions.0, style in up_blocks.0.attentions.1, nothing "
    "else. NP-LoRA: both, what content does in the style's directions by a third less.": (
        "两个 LoRA 的融合方式。K-LoRA：采用最大元素更重的 LoRA。"
        "Direct merge：每层每步同时使用两个 LoRA。LoRA Switch：内容与风格逐步交替。"
        "LoRA Composite：两者各自预测后取平均，耗时加倍。"
        "Fixed selection：S(t) 小于 1 时用内容，之后用风格。"
        "Random selection：以 1/3 的概率用内容，否则用风格。"
        "Top-K without scale：S(t) = 1 的 K-LoRA。Without γ：γ = 1 的 K-LoRA。"
        "EST-LoRA：同 K-LoRA，但比较全部元素的能量，并用作者程序的 γ。"
        "B-LoRA：仅限 SDXL，内容用于 up_blocks.0.attentions.0，风格用于 up_blocks.0.attentions.1，"
        "其余不应用。NP-LoRA：同时使用两者，内容在风格方向上的部分减少三分之一。",
        "2 つの LoRA の融合方式。K-LoRA：最大要素の重い方の LoRA。"
        "Direct merge：全層・全ステップで両方。LoRA Switch：1 ステップごとに内容と画風を交互に。"
        "LoRA Composite：それぞれが単独で予測し、平均します。時間は 2 倍かかります。"
        "Fixed selection：S(t) が 1 未満の間は内容、以後は画風。"
        "Random selection：確率 1/3 で内容、それ以外は画風。"
        "Top-K without scale：S(t) = 1 の K-LoRA。Without γ：γ = 1 の K-LoRA。"
        "EST-LoRA：K-LoRA と同様だが、全要素のエネルギーと著者のプログラムの γ を使用。"
        "B-LoRA：SDXL 専用。内容は up_blocks.0.attentions.0、画風は up_blocks.0.attentions.1 のみ、"
        "他は適用しません。"
        "NP-LoRA：両方。ただし内容のうち画風の方向にある部分は 3 分の 1 減らします。",
    ),
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
    "Multiplies K = rank × rank, the number of entries that decide a layer.": (
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
        "as first pass：使用上面的缩放因子、α 和 β。own：使用下面的设置。",
        "as first pass：上のスケール、α、β を使用。own：下の設定を使用。",
    ),
    "Hires scale": ("高清修复缩放因子", "高解像度スケール"),
    "As Scale S(t), for the hires pass.": (
        "同“缩放因子 S(t)”，用于高清修复阶段。",
        "「スケール S(t)」の高解像度パス用。",
    ),
    "Hires α: slope": ("高清修复 α：斜率", "高解像度 α：傾き"),
    "As α, for the hires pass.": ("同 α，用于高清修复阶段。", "α の高解像度パス用。"),
    "Hires β: start": ("高清修复 β：起点", "高解像度 β：始点"),
    "As β, for the hires pass.": ("同 β，用于高清修复阶段。", "β の高解像度パス用。"),
    "Selection seed": ("选择的种子", "選択のシード"),
    "Seed of Random selection: the same number repeats the selection. The picture has its own "
    "seed.": (
        "Random selection 的种子：对同样的两个文件，相同的数字给出相同的选择。与图像的种子无关。",
        "Random selection のシード：同じ 2 つのファイルなら、同じ数で同じ選択になります。"
        "画像のシードとは別です。",
    ),
    "Share at the start": ("起始占比", "開始時の割合"),
    "Share at the end": ("结束占比", "終了時の割合"),
    "With the scale “share”: percentage of the layers that get the subject in the first step.": (
        "缩放因子为 share 时：第一步中使用主体的层所占的百分比。",
        "スケールが share のとき：最初のステップで主題を使う層の割合（%）。",
    ),
    "With the scale “share”: percentage of the layers that still get the subject in the end.": (
        "缩放因子为 share 时：最后仍使用主体的层所占的百分比。",
        "スケールが share のとき：最後まで主題を使う層の割合（%）。",
    ),
    "Hires share at the start": ("高清修复起始占比", "高解像度の開始時の割合"),
    "Hires share at the end": ("高清修复结束占比", "高解像度の終了時の割合"),
    "As Share at the start, for the hires pass.": (
        "同“起始占比”，用于高清修复阶段。",
        "「開始時の割合」の高解像度パス用。",
    ),
    "As Share at the end, for the hires pass.": (
        "同“结束占比”，用于高清修复阶段。",
        "「終了時の割合」の高解像度パス用。",
    ),
    "Preview selection": ("预览选择图", "選択をプレビュー"),
    "Paper defaults": ("论文默认值", "論文の既定値"),
    "Advanced": ("高级", "詳細"),
    NO_LORA: ("无（使用标签）", "なし（タグを使用）"),
    "K-LoRA: compare": ("K-LoRA：对比", "K-LoRA：比較"),
    "Ways": ("方式", "方式の種類"),
    "Seeds, one row each": ("种子数（每个一行）", "シードの数（1 つにつき 1 行）"),
    "Clear cache": ("清除缓存", "キャッシュを消去"),
    "Choose a content and a style LoRA, or write": (
        "请选择内容 LoRA 和风格 LoRA，或在提示词中写入",
        "内容 LoRA と画風 LoRA を選ぶか、プロンプトに",
    ),
    "in the prompt.": ("。", "と書いてください。"),
    "Analysing": ("正在分析", "解析中"),
    "subject": ("主体", "主題"),
    "style": ("风格", "画風"),
    "content": ("内容", "内容"),
    "both": ("两者", "両方"),
    "neither": ("都不用", "どちらもなし"),
    "changes": ("变化次数", "切り替え回数"),
    page.STEP: ("步骤", "ステップ"),
    page.CONTENT_SHARE: ("内容 %", "内容 %"),
    page.ALONE: ("仅一个文件有", "片方のファイルのみ"),
    page.AS_TABLE: ("以表格显示", "表で見る"),
    page.MAP_HINT: (
        "将指针移到图上，或用方向键在图中移动。",
        "図を指すか、矢印キーで図の中を移動してください。",
    ),
    "block": ("块", "ブロック"),
    "layers": ("层数", "層の数"),
    "S_c/(γ·S_s), median": ("S_c/(γ·S_s) 中位数", "S_c/(γ·S_s) の中央値"),
    "content, of its steps": ("内容占其步骤", "内容：ステップの割合"),
    "content, of the layers": ("内容占各层", "内容：層の割合"),
    "K-LoRA: use as content. Again to remove; the other letter swaps the roles.": (
        "K-LoRA：用作内容。再按一次：移除。按另一个字母：交换两者的角色。",
        "K-LoRA：内容にする。もう一度押すと外す。もう一方の文字で役割を入れ替え。",
    ),
    "K-LoRA: use as style. Again to remove; the other letter swaps the roles.": (
        "K-LoRA：用作风格。再按一次：移除。按另一个字母：交换两者的角色。",
        "K-LoRA：画風にする。もう一度押すと外す。もう一方の文字で役割を入れ替え。",
    ),
    "Tags without the accordion": ("不打开折叠面板也使用标签", "アコーディオンなしのタグ"),
    "Two <klora:…> tags work while the accordion is off, with the defaults below.": (
        "折叠面板关闭时，两个 <klora:…> 标签仍然有效，并采用下面的默认值。",
        "アコーディオンがオフでも、2 つの <klora:…> タグは下の既定値で有効です。",
    ),
    "Selection map in the gallery": ("在图库中显示选择图", "選択マップをギャラリーに表示"),
    "Show which LoRA each layer got, after the images.": (
        "在图像之后显示每一层采用了哪个 LoRA。",
        "各層がどの LoRA を使ったかを、画像の後に表示します。",
    ),
    "Save the selection map": ("保存选择图", "選択マップを保存"),
    "Beside the first image, as NAME-klora.png.": (
        "保存在第一张图像旁，文件名为 NAME-klora.png。",
        "最初の画像の隣に NAME-klora.png として保存します。",
    ),
    "Log level": ("日志级别", "ログレベル"),
    "How much K-LoRA writes to the log.": (
        "K-LoRA 写入日志的详细程度。",
        "K-LoRA がログに書く量。",
    ),
    "The analysis cache takes": ("分析缓存大小为", "解析キャッシュは"),
    "MiB, of": ("MiB，上限", "MiB、上限"),
    "MiB at most. It keeps the analysis of each LoRA file, so that none is analysed twice.": (
        "MiB。它保存 LoRA 文件的比较结果，使同一文件不必重复分析。",
        "MiB です。LoRA ファイルの比較結果を保存し、同じファイルの再解析を省きます。",
    ),
    "Not all of the cache could be removed: allow the WebUI to write to the folder": (
        "缓存未能全部删除：请允许 WebUI 写入此文件夹",
        "キャッシュの一部を削除できませんでした。WebUI に次のフォルダーへの書き込みを許可するか",
    ),
    ", or remove its files yourself.": (
        "，或自行删除其中的文件。",
        "、中のファイルをご自分で削除してください。",
    ),
    "K-LoRA is installed": ("K-LoRA 被安装了", "K-LoRA が"),
    "times, in the folders": (
        "次，所在文件夹：",
        "回インストールされています。フォルダー：",
    ),
    ": only the one in": ("。只使用其中的", "。使われるのは"),
    "is used. Remove all others, then restart the WebUI.": (
        "。请删除其余的，然后重启 WebUI。",
        "だけです。ほかをすべて削除して WebUI を再起動してください。",
    ),
    "Hires:": ("高清修复：", "高解像度："),
    "% content": ("% 内容", "% 内容"),
    "% both": ("% 两者", "% 両方"),
    "above": ("高于", "次を超える："),
    "below": ("低于", "次を下回る："),
    "style takes over at step": ("风格接替于步骤", "画風に替わるステップ："),
    "content takes over at step": ("内容接替于步骤", "内容に替わるステップ："),
    ", content at step": ("，内容接替于步骤", "、内容に替わるステップ："),
    ", style at step": ("，风格接替于步骤", "、画風に替わるステップ："),
    "of": ("/", "/"),
    "content has more layers in every step": (
        "每一步内容的层都更多",
        "どのステップでも内容の層が多い",
    ),
    "style has more layers in every step": (
        "每一步风格的层都更多",
        "どのステップでも画風の層が多い",
    ),
    "content and style take turns,": ("内容与风格交替", "内容と画風が交互に"),
    "times in": ("次，共", "回、全"),
    "steps": ("步", "ステップ"),
    "each LoRA predicts by itself in every step, and the two are averaged": (
        "每一步由两个 LoRA 各自预测，再取平均",
        "毎ステップ、各 LoRA が単独で予測し、その平均を使います",
    ),
    "every layer gets both in every step": (
        "每层每步都同时使用两者",
        "どの層もすべてのステップで両方を使用",
    ),
    "every step is content, style is never used": (
        "每一步都是内容，风格从未起作用",
        "すべてのステップが内容で、画風は使われません",
    ),
    "every step is style, content is never used": (
        "每一步都是风格，内容从未起作用",
        "すべてのステップが画風で、内容は使われません",
    ),
    "layer only in the content file": ("层仅在内容文件中", "層が内容ファイルのみにあります"),
    "layers only in the content file": ("层仅在内容文件中", "層が内容ファイルのみにあります"),
    "layer only in the style file": ("层仅在风格文件中", "層が画風ファイルのみにあります"),
    "layers only in the style file": ("层仅在风格文件中", "層が画風ファイルのみにあります"),
    "no layer is in both files": ("没有两个文件共有的层", "両方のファイルにある層がありません"),
    "Subject": ("主体", "主題"),
    ", style": ("，风格", "、画風"),
    "The prompt's <klora:…> tags are used, not the LoRAs named beside them.": (
        "使用提示词中的 <klora:…> 标签，而非另外选择的 LoRA。",
        "別に選んだ LoRA ではなく、プロンプトの <klora:…> タグを使います。",
    ),
    "The first pass has K-LoRA, the hires pass does not.": (
        "第一遍使用了 K-LoRA，高分辨率修复这一遍没有使用。",
        "最初のパスには K-LoRA が使われ、高解像度補助のパスには使われていません。",
    ),
    "The steps before the refiner have K-LoRA, the refiner's do not.": (
        "Refiner 之前的各步使用了 K-LoRA，Refiner 的各步没有使用。",
        "Refiner より前のステップには K-LoRA が使われ、Refiner のステップには使われていません。",
    ),
    "layer of": ("层属于", "層："),
    page.OFF: (
        "K-LoRA 未勾选：生成图像时不会使用此处的选择。",
        "K-LoRA にチェックが入っていません。ここでの選択は画像に使われません。",
    ),
    page.NOT_EVERY: (
        "这次运行中并非每张图片都使用了 K-LoRA。",
        "この実行のすべての画像に K-LoRA が使われたわけではありません。",
    ),
    "layers of": ("层属于", "層："),
    "(such as": ("（例如", "（例："),
    ") does not fit this model and is left out.": (
        "）不适合此模型，已略过。",
        "）はこのモデルに合わないため省きました。",
    ),
    ") do not fit this model and are left out.": (
        "）不适合此模型，已略过。",
        "）はこのモデルに合わないため省きました。",
    ),
    ") is of a type that K-LoRA cannot compare and is left out.": (
        "）的类型 K-LoRA 无法比较，已略过。",
        "）は K-LoRA が比較できない種類のため省きました。",
    ),
    ") are of a type that K-LoRA cannot compare and are left out.": (
        "）的类型 K-LoRA 无法比较，已略过。",
        "）は K-LoRA が比較できない種類のため省きました。",
    ),
    "No LoRAs are given: choose a content and a style LoRA, or write two <klora:NAME> tags.": (
        "没有指定 LoRA：请选择内容 LoRA 和风格 LoRA，或写两个 <klora:NAME> 标签。",
        "LoRA が指定されていません：内容 LoRA と画風 LoRA を選ぶか、"
        "<klora:NAME> タグを 2 つ書いてください。",
    ),
    "K-LoRA is switched on, but no LoRAs are given: write two <klora:NAME> tags, or name a content "
    "and a style LoRA.": (
        "K-LoRA 已启用，但没有指定 LoRA：请写两个 <klora:NAME> 标签，或选择内容 LoRA 和风格 LoRA。",
        "K-LoRA はオンですが、LoRA が指定されていません：<klora:NAME> タグを 2 つ書くか、"
        "内容 LoRA と画風 LoRA を選んでください。",
    ),
    "There is no LoRA": ("没有这个 LoRA：", "この LoRA はありません："),
    ": check the spelling against the Lora tab, and press Refresh there if the file is new.": (
        "。请对照 Lora 标签页检查拼写；如果是新文件，请在那里按刷新。",
        "。Lora タブで綴りを確かめ、新しいファイルならそこで更新を押してください。",
    ),
    "K-LoRA needs exactly two <klora:…> tags, one for the subject and one for the style, but the "
    "prompt has": (
        "K-LoRA 需要恰好两个 <klora:…> 标签，一个用于主体，一个用于风格，但提示词中的数量为",
        "K-LoRA には <klora:…> タグがちょうど 2 つ（主題と画風に 1 つずつ）必要ですが、"
        "プロンプトにある数は",
    ),
    "): add a second one.": (")：请再加一个。", ")：もう 1 つ加えてください。"),
    "is no finite number: write a weight such as": (
        "不是有限数：请写出权重，例如",
        "は有限の数ではありません：重みを書いてください。例：",
    ),
    ", or a role (content, style).": (
        "，或角色（content、style）。",
        "、または役割（content、style）。",
    ),
    "): keep two": (")：请保留两个", ")：2 つだけ残してください"),
    "others can be <lora:…>.": ("其余可用 <lora:…>。", "他は <lora:…> にできます。"),
    "The comparison of the two LoRAs was interrupted: generate again and it goes on where it "
    "stopped.": (
        "两个 LoRA 的比较被中断：再次生成时会从中断处继续。",
        "2 つの LoRA の比較が中断されました：もう一度生成すると続きから始まります。",
    ),
    "The WebUI could not apply K-LoRA to every layer, most often because memory is full, so the "
    "picture is made without it: choose a smaller size, or generate again.": (
        "WebUI 未能把 K-LoRA 应用到所有层（多半是内存不足），因此这张图不使用 K-LoRA："
        "请选择较小的尺寸，或再次生成。",
        "WebUI が K-LoRA を一部の層に適用できなかったため（多くはメモリ不足）、"
        "この画像は K-LoRA なしで作られます：サイズを小さくするか、もう一度生成してください。",
    ),
    "The picture is made without K-LoRA, because another extension samples with a model of its own "
    "that has no LoRAs, or changes LoRAs between steps: switch that extension off.": (
        "这张图不使用 K-LoRA，因为另一个扩展用它自己的、不带 LoRA 的模型采样，"
        "或在各步之间更改 LoRA：请关闭该扩展。",
        "別の拡張機能が LoRA のない独自のモデルでサンプリングするか、"
        "ステップの間に LoRA を変えるため、この画像は K-LoRA なしで作られます："
        "その拡張機能をオフにしてください。",
    ),
    "LoRA Composite needs two predictions in each step, and another extension calls the model in a "
    "way of its own: switch that extension off, or choose another method.": (
        "LoRA Composite 每一步需要两次预测，而另一个扩展以它自己的方式调用模型："
        "请关闭该扩展，或选择其他方法。",
        "LoRA Composite は毎ステップ 2 回の予測が必要ですが、別の拡張機能が独自の方法でモデルを"
        "呼び出しています：その拡張機能をオフにするか、別の方式を選んでください。",
    ),
    "The WebUI applies no LoRAs to the SD Unet": (
        "WebUI 不会对这个 SD Unet 应用 LoRA：",
        "WebUI は次の SD Unet に LoRA を適用しません：",
    ),
    ", so the picture is made without K-LoRA. To use it, choose None in Settings → Stable "
    "Diffusion → SD Unet.": (
        "，因此这张图不使用 K-LoRA。要使用它，请在 设置 → Stable Diffusion → SD Unet 中选择 None。",
        "。そのため、この画像は K-LoRA なしで作られます。使うには、"
        "設定 → Stable Diffusion → SD Unet で None を選んでください。",
    ),
    "Refresh the LoRA lists": ("刷新 LoRA 列表", "LoRA の一覧を更新"),
    "K-LoRA has a content LoRA but no style LoRA: name both, or neither and write two <klora:…> "
    "tags.": (
        "有内容 LoRA，但没有风格 LoRA：请两个都选，或都不选并写两个 <klora:…> 标签。",
        "内容 LoRA はありますが、画風 LoRA がありません：両方を選ぶか、どちらも選ばずに"
        " <klora:…> タグを 2 つ書いてください。",
    ),
    "K-LoRA has a style LoRA but no content LoRA: name both, or neither and write two <klora:…> "
    "tags.": (
        "有风格 LoRA，但没有内容 LoRA：请两个都选，或都不选并写两个 <klora:…> 标签。",
        "画風 LoRA はありますが、内容 LoRA がありません：両方を選ぶか、どちらも選ばずに"
        " <klora:…> タグを 2 つ書いてください。",
    ),
    "and": ("和", "と"),
    "both have the role content: make one of them content and the other style.": (
        "的角色都是内容：请将其中一个改为风格。",
        "の役割がどちらも内容です：一方を画風にしてください。",
    ),
    "both have the role style: make one of them content and the other style.": (
        "的角色都是风格：请将其中一个改为内容。",
        "の役割がどちらも画風です：一方を内容にしてください。",
    ),
    "The prompt has <klora:…> tags, but the K-LoRA accordion is off, and Settings → K-LoRA says "
    "that tags need it: switch one of the two on.": (
        "提示词中有 <klora:…> 标签，但 K-LoRA 折叠面板已关闭，而设置 → K-LoRA 规定标签需要它："
        "请打开其中之一。",
        "プロンプトに <klora:…> タグがありますが、K-LoRA のアコーディオンがオフで、"
        "設定 → K-LoRA ではタグにそれが必要です：どちらかをオンにしてください。",
    ),
    "Settings →": ("设置 →", "設定 →"),
    "alpha is": ("alpha 为", "alpha は"),
    ", but S* wraps around at alpha: set alpha above": (
        "，但 S* 以 alpha 为周期：请将 alpha 设为大于",
        "ですが、S* は alpha で折り返します：alpha を",
    ),
    ", or S.": ("，或选择 S。", "より大きくするか、S を選んでください。"),
    "does not fit this model:": ("不适用于此模型：", "はこのモデルに合いません："),
    "of its": ("/", "/"),
    "layers fit, and the others (such as": ("层适合，其余的层（例如", "層が合い、ほかの層（例："),
    ") have no counterpart that this WebUI can apply them to. Choose another file or checkpoint.": (
        "）没有此 WebUI 可以应用的对应层。请选择其他文件或其他模型。",
        "）には、この WebUI が適用できる対応する層がありません。別のファイルかチェックポイントを"
        "選んでください。",
    ),
    "does not fit this model: it was made for": (
        "不适用于此模型：它是为以下模型制作的：",
        "はこのモデルに合いません。対象のモデル：",
    ),
    ", the checkpoint is": ("，而当前模型是", "、チェックポイント："),
    ", and": ("，适合的层：", "、合う層："),
    "layers fit. Choose a LoRA for": (
        "层。请选择适用于以下模型的 LoRA：",
        "層。次のモデル用の LoRA か：",
    ),
    ", or a checkpoint for this one.": (
        "，或适合此文件的模型。",
        "、このファイルに合うチェックポイントを選んでください。",
    ),
    "was made for": ("的对象模型是", "の対象のモデル："),
    ", and the checkpoint is": ("，而当前模型是", "、チェックポイント："),
    "layers fit.": ("层适合。", "層が合います。"),
    "is for this model, but its layer names are in a spelling that this WebUI does not read (such "
    "as": (
        "适用于此模型，但其层名的写法此 WebUI 无法识别（例如",
        "はこのモデル用ですが、層の名前がこの WebUI の読めない表記です（例：",
    ),
    "layers are read). Write it anew:": (
        "层可以识别）。请重新写出该文件：",
        "層が読めます）。次のコマンドで書き直すか：",
    ),
    "in the extension's folder, or choose another file.": (
        "（在扩展的文件夹中运行），或选择其他文件。",
        "（拡張機能のフォルダーで実行）、別のファイルを選んでください。",
    ),
    "have no layer in common, so there is nothing to choose: both are applied all the time.": (
        "没有共有的层，因此无可选择：两者始终都会应用。",
        "に共通の層がないので選ぶものがなく、どちらも常に適用されます。",
    ),
    "is for this model, but this WebUI drops the whole file for the": (
        "适用于此模型，但此 WebUI 会因其中的",
        "はこのモデル用ですが、この WebUI は次の数のテンソルのためファイル全体を無視します：",
    ),
    "tensors in it that are no part of a layer (such as": (
        "个不属于任何层的张量而忽略整个文件（例如",
        "（どの層にも属さないもの、例：",
    ),
    "). Write it anew without them:": (
        "）。请去掉它们并重新写出：",
        "）。それらを除いて書き直すか：",
    ),
    ") has rank zero: left out.": ("）的秩为零，已略过。", "）はランクが 0 のため省きました。"),
    ") have rank zero: left out.": ("）的秩为零，已略过。", "）はランクが 0 のため省きました。"),
    "is a DoRA as PEFT saves it: its magnitudes (such as": (
        "是 PEFT 保存的 DoRA：其 magnitude（例如",
        "は PEFT が保存した DoRA です：その magnitude（例：",
    ),
    ") are not applied, by <lora:…> neither.": (
        "）不会被应用，<lora:…> 也不会应用。",
        "）は適用されません。<lora:…> でも同じです。",
    ),
    "tensors of": ("个张量属于", "個のテンソル："),
    ") are not used: the layers are applied without them, as by <lora:…>.": (
        "）未被使用：各层在没有它们的情况下应用，与 <lora:…> 相同。",
        "）は使われません：<lora:…> と同じく、それらなしで層が適用されます。",
    ),
    "LoRAs have the alias": ("个 LoRA 有相同的别名", "個の LoRA が同じ別名を持っています："),
    ": write the name of one of them,": (
        "：请写出其中一个的名称：",
        "。どちらかの名前を書いてください：",
    ),
    "or": ("或", "または"),
    "content in its block, style in its own, nothing else is applied": (
        "内容与风格各在自己的块中，其余不应用",
        "内容と画風はそれぞれのブロックだけで、他は適用しません",
    ),
    "% of content in the style's directions": (
        "% 的内容在风格的方向上",
        "% の内容が画風の方向",
    ),
    "NP-LoRA leaves": ("NP-LoRA 使以下层保持 Direct merge 的做法：", "NP-LoRA は"),
    ") as in Direct merge, because not both files have LoRA factors there.": (
        "），因为并非两个文件都有该层的 LoRA 因子。",
        "）を Direct merge のままにします：両ファイルに LoRA の因子がそろっていません。",
    ),
    "hardly overlap (": ("几乎不重叠（", "はほとんど重なりません（"),
    "% of content in the style's directions), so this is nearly Direct merge.": (
        "% 的内容在风格的方向上），因此结果接近 Direct merge。",
        "% の内容が画風の方向）。そのためほぼ Direct merge です。",
    ),
    "B-LoRA is for": ("B-LoRA 适用于", "B-LoRA は次のモデル用です："),
    ": choose another checkpoint or method.": (
        "：请选择其他模型或方法。",
        "。別のチェックポイントか方式を選んでください。",
    ),
    "has no layer in up_blocks.0.attentions.0, and B-LoRA applies nothing else of the content "
    "LoRA: swap the two if they are the wrong way round, or choose another file.": (
        "没有 up_blocks.0.attentions.0 中的层，而 B-LoRA 只应用内容 LoRA 的这一块："
        "若两者放反了请互换，或选择其他文件。",
        "には up_blocks.0.attentions.0 の層がなく、B-LoRA は内容 LoRA の他の部分を適用しません："
        "逆なら 2 つを入れ替えるか、別のファイルを選んでください。",
    ),
    "has no layer in up_blocks.0.attentions.1, and B-LoRA applies nothing else of the style LoRA: "
    "swap the two if they are the wrong way round, or choose another file.": (
        "没有 up_blocks.0.attentions.1 中的层，而 B-LoRA 只应用风格 LoRA 的这一块："
        "若两者放反了请互换，或选择其他文件。",
        "には up_blocks.0.attentions.1 の層がなく、B-LoRA は画風 LoRA の他の部分を適用しません："
        "逆なら 2 つを入れ替えるか、別のファイルを選んでください。",
    ),
    "has no layer in up_blocks.0.attentions.0, nor": (
        "没有 up_blocks.0.attentions.0 中的层，且",
        "には up_blocks.0.attentions.0 の層がなく、",
    ),
    "in up_blocks.0.attentions.1, and B-LoRA applies nothing else: swap the two if they are the "
    "wrong way round, or choose another method.": (
        "没有 up_blocks.0.attentions.1 中的层，而 B-LoRA 只应用这两块："
        "若两者放反了请互换，或选择其他方法。",
        "には up_blocks.0.attentions.1 の層がなく、B-LoRA は他を適用しません："
        "逆なら 2 つを入れ替えるか、別の方式を選んでください。",
    ),
    "K-LoRA does not know this network: the": (
        "K-LoRA 不认识此网络：名称中带有 attention 的",
        "K-LoRA はこのネットワークを知りません：名前に attention を含む",
    ),
    "layers with attention in their names were taken to be its attention.": (
        "层被当作它的注意力层。",
        "層を注意機構とみなしました。",
    ),
    "The LoRA": ("此图像的 LoRA", "この画像の LoRA"),
    "of this picture is now called": ("现在的名称是", "の現在の名前は"),
    "of this picture (": ("（", "（"),
    ") is not here.": ("）不在这里。", "）はここにありません。"),
    "is not the file that this picture was made with (": (
        "不是制作此图像所用的文件 (",
        "はこの画像の作成に使われたファイルではありません (",
    ),
    "This picture's parameters say": ("此图像的参数中有", "この画像のパラメータの"),
    ", which this version of K-LoRA does not know: it is left out.": (
        "，此版本的 K-LoRA 不认识它，已忽略。",
        "は、この版の K-LoRA では不明なため無視されます。",
    ),
}
PUNCTUATION = {"(", ").", ",", ".", ":", "; "}
"""The same in every language."""


def texts() -> list[str]:
    """Every text that a person sees in the accordion, on the Settings page and of a run.

    Not the words to choose from, such as “all”: they are what the API takes, and the host would
    translate them wherever they stand in its own page.
    """
    found = dict.fromkeys(OTHER_TEXTS)
    for field in FIELDS:
        found |= dict.fromkeys((field.label, field.help))
    for option in (*page.OPTIONS, page.LOG_LEVEL):
        found |= dict.fromkeys((option.label, option.help))
    for sentence in SENTENCES:
        found |= dict.fromkeys(part.strip() for part, fixed in page.fragments(sentence) if fixed)
    return [text for text in found if text not in NAMES | PUNCTUATION]


def on_settings_page() -> dict[str, tuple[str, str]]:
    """The same texts once more, with what the Settings page puts around them: {text with it: (text
    that is translated, how it is written with it)}."""
    found = {}
    for help_text in (*(f.help for f in page.TAG_DEFAULTS), *(o.help for o in page.OPTIONS)):
        found[f"({help_text})"] = help_text, "({})"
    found[f"({page.LOG_LEVEL.help})"] = page.LOG_LEVEL.help, "({})"
    beta = next(field.label for field in FIELDS if field.name == "beta")
    for scale in ("S", "S*"):
        found[f"{beta} ({scale})"] = beta, f"{{}} ({scale})"
    return found


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
        for text, (inner, around) in on_settings_page().items():
            words[text] = around.format(TRANSLATIONS[inner][i])
        content = json.dumps(words, ensure_ascii=False, indent=2) + "\n"
        if "--check" not in sys.argv:
            path.write_text(content, encoding="utf8")
        elif path.read_text(encoding="utf8") != content:
            print(f"{path} is not up to date: run this without --check")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
