"""The texts of the web app in every interface language: one table, nothing else to translate.

Questions, answers and error lines are never translated: they are passed through as they are.
"""

from __future__ import annotations

import re

LANGUAGES = {"en": "English", "es": "Español", "de": "Deutsch", "zh": "中文"}
DEFAULT = "en"

# What is spoken, for the recogniser: "" is detected. Names in the language itself.
SPOKEN = {
    "": "",
    "en": "English",
    "es": "Español",
    "de": "Deutsch",
    "zh": "中文",
    "fr": "Français",
    "it": "Italiano",
    "pt": "Português",
    "nl": "Nederlands",
    "pl": "Polski",
    "ru": "Русский",
    "uk": "Українська",
    "tr": "Türkçe",
    "ar": "العربية",
    "hi": "हिन्दी",
    "ja": "日本語",
    "ko": "한국어",
}

_ORDER = ("en", "es", "de", "zh")
_TABLE: dict[str, tuple[str, str, str, str]] = {
    # -- tabs and frames ---------------------------------------------------------------------------
    "tagline": (
        "Ask about pictures. Everything stays on this machine.",
        "Pregunta sobre imágenes. Todo se queda en este equipo.",
        "Fragen zu Bildern. Alles bleibt auf diesem Rechner.",
        "向图片提问。一切都留在本机。",
    ),
    "tagline_public": (
        "Ask about pictures. Conversations are removed after a day.",
        "Pregunta sobre imágenes. Las conversaciones se borran al cabo de un día.",
        "Fragen zu Bildern. Gespräche werden nach einem Tag gelöscht.",
        "向图片提问。对话在一天后删除。",
    ),
    "chat": ("Chat", "Chat", "Chat", "聊天"),
    "batch": ("Batch", "Lote", "Stapel", "批量"),
    "training": ("Training", "Entrenamiento", "Training", "训练"),
    "by_text": ("Text", "Texto", "Text", "文字"),
    "by_voice": ("Voice", "Voz", "Sprache", "语音"),
    "settings": ("Settings", "Ajustes", "Einstellungen", "设置"),
    # -- chat --------------------------------------------------------------------------------------
    "new_conversation": ("New conversation", "Nueva conversación", "Neues Gespräch", "新对话"),
    "conversations": (
        "Saved conversations",
        "Conversaciones guardadas",
        "Gespeicherte Gespräche",
        "已保存的对话",
    ),
    "delete_conversation": (
        "Delete this conversation",
        "Borrar esta conversación",
        "Dieses Gespräch löschen",
        "删除此对话",
    ),
    "untitled": ("Pictures", "Imágenes", "Bilder", "图片"),
    "unreadable": ("(unreadable)", "(ilegible)", "(unlesbar)", "（无法读取）"),
    "question_here": (
        "Ask something, add pictures",
        "Pregunta algo, añade imágenes",
        "Etwas fragen, Bilder dazulegen",
        "输入问题，可添加图片",
    ),
    "welcome": (
        "Ask about a picture, or try one of these",
        "Pregunta sobre una imagen o prueba uno de estos ejemplos",
        "Zu einem Bild fragen oder eines hiervon versuchen",
        "就一张图片提问，或试试下面的例子",
    ),
    "ask_something": (
        "Ask something or add a picture first.",
        "Pregunta algo o añade primero una imagen.",
        "Zuerst etwas fragen oder ein Bild dazulegen.",
        "请先输入问题或添加图片。",
    ),
    "still_answering": (
        "An answer is still being written; stop it first.",
        "Aún se está escribiendo una respuesta; detenla primero.",
        "Eine Antwort wird noch geschrieben; bitte erst anhalten.",
        "回答仍在生成，请先停止。",
    ),
    "too_many_recordings": (
        "Many recordings wait to be heard; try again in a moment.",
        "Hay muchas grabaciones en espera; inténtalo de nuevo en un momento.",
        "Viele Aufnahmen warten; bitte gleich noch einmal versuchen.",
        "等待识别的录音较多，请稍后再试。",
    ),
    "not_heard": (
        "The recording was stopped before it was heard to its end.",
        "La grabación se detuvo antes de oírse hasta el final.",
        "Die Aufnahme wurde angehalten, bevor sie zu Ende gehört war.",
        "录音在识别完成之前已停止。",
    ),
    "no_answer": ("(no answer)", "(sin respuesta)", "(keine Antwort)", "（没有回答）"),
    "stop": ("Stop", "Detener", "Anhalten", "停止"),
    "nothing_there": (
        "That message is not there any more.",
        "Ese mensaje ya no existe.",
        "Diese Nachricht gibt es nicht mehr.",
        "该消息已不存在。",
    ),
    # -- the line under an answer ------------------------------------------------------------------
    "status_stop": (
        "tokens: {tokens}, {rate} a second",
        "tokens: {tokens}, {rate} por segundo",
        "Token: {tokens}, {rate} je Sekunde",
        "词元：{tokens}，每秒 {rate} 个",
    ),
    "status_cached": (
        "answered before: from the cache",
        "ya respondida: de la caché",
        "schon beantwortet: aus dem Zwischenspeicher",
        "此前已回答：取自缓存",
    ),
    "status_length": (
        "cut at {tokens} tokens; allow more in the settings",
        "cortada a los {tokens} tokens; permite más en los ajustes",
        "nach {tokens} Token abgeschnitten; mehr erlauben die Einstellungen",
        "已在 {tokens} 个词元处截断；可在设置中放宽",
    ),
    "status_cancelled": (
        "stopped after {tokens} tokens",
        "detenida tras {tokens} tokens",
        "nach {tokens} Token angehalten",
        "在 {tokens} 个词元后停止",
    ),
    "status_filtered": (
        "withheld by the content filter",
        "retenida por el filtro de contenido",
        "vom Inhaltsfilter zurückgehalten",
        "已被内容过滤器拦下",
    ),
    # -- voice -------------------------------------------------------------------------------------
    "record": (
        "Speak your question, or upload a recording",
        "Di tu pregunta o sube una grabación",
        "Frage sprechen oder Aufnahme hochladen",
        "说出问题，或上传录音",
    ),
    "pictures_optional": (
        "Pictures (optional)",
        "Imágenes (opcional)",
        "Bilder (wahlweise)",
        "图片（可选）",
    ),
    "ask": ("Ask", "Preguntar", "Fragen", "提问"),
    "heard": ("What was heard", "Lo que se oyó", "Was gehört wurde", "识别结果"),
    "spoken_answer": (
        "The answer, spoken",
        "La respuesta, hablada",
        "Die Antwort, gesprochen",
        "语音回答",
    ),
    "no_recording": (
        "Record or upload a question first.",
        "Graba o sube primero una pregunta.",
        "Zuerst eine Frage aufnehmen oder hochladen.",
        "请先录制或上传问题。",
    ),
    "no_speech_model": (
        "No speech model is loaded, so recordings cannot be understood here.",
        "No hay un modelo de voz cargado; aquí no se entienden grabaciones.",
        "Kein Sprachmodell geladen; Aufnahmen werden hier nicht verstanden.",
        "未加载语音模型，无法识别录音。",
    ),
    "no_voice": (
        "No voice is installed, so answers cannot be spoken.",
        "No hay ninguna voz instalada; las respuestas no se pueden leer.",
        "Keine Stimme installiert; Antworten können nicht vorgelesen werden.",
        "未安装语音，无法朗读回答。",
    ),
    # -- settings ----------------------------------------------------------------------------------
    "interface_language": (
        "Interface language",
        "Idioma de la interfaz",
        "Sprache der Oberfläche",
        "界面语言",
    ),
    "spoken_language": ("Spoken language", "Idioma hablado", "Gesprochene Sprache", "口语语言"),
    "detect": ("detect", "detectar", "erkennen", "自动检测"),
    "translate": (
        "Translate speech to English",
        "Traducir la voz al inglés",
        "Gesprochenes ins Englische übersetzen",
        "将语音翻译成英语",
    ),
    "denoise": ("Reduce noise", "Reducir el ruido", "Rauschen mindern", "降噪"),
    "speak_answers": (
        "Read answers aloud",
        "Leer las respuestas en voz alta",
        "Antworten vorlesen",
        "朗读回答",
    ),
    "temperature": ("Temperature", "Temperatura", "Temperatur", "温度"),
    "temperature_info": (
        "0 takes the likeliest word",
        "0 elige la palabra más probable",
        "0 nimmt das wahrscheinlichste Wort",
        "0 取最可能的词",
    ),
    "top_p": ("Top-p", "Top-p", "Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k (0: todas)", "Top-k (0: alle)", "Top-k（0：全部）"),
    "repetition_penalty": (
        "Repetition penalty",
        "Penalización por repetición",
        "Strafe für Wiederholung",
        "重复惩罚",
    ),
    "max_new_tokens": (
        "Longest answer (tokens)",
        "Respuesta más larga (tokens)",
        "Längste Antwort (Token)",
        "最长回答（词元）",
    ),
    "seed": (
        "Seed (empty: random)",
        "Semilla (vacío: al azar)",
        "Startwert (leer: zufällig)",
        "随机种子（留空：随机）",
    ),
    "bad_seed": (
        "The seed must be a whole number of 0 or more.",
        "La semilla debe ser un número entero desde 0.",
        "Der Startwert muss eine ganze Zahl ab 0 sein.",
        "随机种子必须是不小于 0 的整数。",
    ),
    # -- batch -------------------------------------------------------------------------------------
    "batch_intro": (
        "Ask the same question about many pictures.",
        "Haz la misma pregunta sobre muchas imágenes.",
        "Dieselbe Frage zu vielen Bildern stellen.",
        "对多张图片提出同一个问题。",
    ),
    "pictures": ("Pictures", "Imágenes", "Bilder", "图片"),
    "question": ("Question", "Pregunta", "Frage", "问题"),
    "answer": ("Answer", "Respuesta", "Antwort", "回答"),
    "picture": ("Picture", "Imagen", "Bild", "图片"),
    "run_batch": ("Ask about all", "Preguntar por todas", "Zu allen fragen", "全部提问"),
    "download_csv": ("Download CSV", "Descargar CSV", "CSV herunterladen", "下载 CSV"),
    "batch_needs": (
        "Add pictures and a question first.",
        "Añade primero imágenes y una pregunta.",
        "Zuerst Bilder und eine Frage angeben.",
        "请先添加图片和问题。",
    ),
    "batch_too_many": (
        "At most {most} pictures at once.",
        "Como máximo {most} imágenes a la vez.",
        "Höchstens {most} Bilder auf einmal.",
        "一次最多 {most} 张图片。",
    ),
    "batch_done": (
        "{done} of {total} answered",
        "{done} de {total} respondidas",
        "{done} von {total} beantwortet",
        "已回答 {done} / {total}",
    ),
    # -- training ----------------------------------------------------------------------------------
    "training_intro": (
        "The curves of a run, read again every few seconds while it trains.",
        "Las curvas de un entrenamiento, releídas cada pocos segundos mientras avanza.",
        "Die Kurven eines Laufs, alle paar Sekunden neu gelesen, während er lernt.",
        "训练曲线，训练期间每隔几秒刷新。",
    ),
    "run": ("Run", "Entrenamiento", "Lauf", "运行"),
    "no_runs": (
        "No run has been trained here yet: train.py begins one.",
        "Aún no hay ningún entrenamiento: train.py inicia uno.",
        "Hier wurde noch nichts trainiert: train.py beginnt einen Lauf.",
        "这里还没有训练记录：用 train.py 开始。",
    ),
    "no_records": (
        "Nothing has been logged yet.",
        "Aún no se ha registrado nada.",
        "Noch ist nichts aufgezeichnet.",
        "尚无记录。",
    ),
    "step": ("Step", "Paso", "Schritt", "步"),
    "state": ("State", "Estado", "Zustand", "状态"),
    "state_running": ("running", "en marcha", "läuft", "运行中"),
    "state_finished": ("finished", "terminado", "beendet", "已完成"),
    "state_stopped": ("stopped", "detenido", "angehalten", "已停止"),
    "state_crashed": (
        "ended without a save",
        "acabó sin guardar",
        "endete ohne Sicherung",
        "未保存即终止",
    ),
    "time_left": ("Time left", "Tiempo restante", "Verbleibend", "剩余时间"),
    "steps_done": ("Steps", "Pasos", "Schritte", "步数"),
    "tokens_per_second": (
        "Tokens a second",
        "Tokens por segundo",
        "Token je Sekunde",
        "每秒词元数",
    ),
    "last_save": (
        "Since the save of step {step}",
        "Desde el guardado del paso {step}",
        "Seit der Sicherung von Schritt {step}",
        "距第 {step} 步保存",
    ),
    "alerts": ("Alerts: {count}", "Avisos: {count}", "Warnungen: {count}", "警告：{count}"),
    "samples": (
        "Sample answers at step {step}",
        "Respuestas de muestra en el paso {step}",
        "Antwortproben bei Schritt {step}",
        "第 {step} 步的示例回答",
    ),
    "right_answer": ("Right answer", "Respuesta correcta", "Richtige Antwort", "正确答案"),
    "trained": ("training", "entrenamiento", "Training", "训练"),
    "validated": ("validation", "validación", "Prüfung", "验证"),
    "alignment": ("Alignment", "Alineación", "Bildbezug", "对齐"),
    "alignment_info": (
        "Right answers with the right picture, with another one, and with a blank one. A model"
        " that ignores the picture scores the same three times.",
        "Aciertos con la imagen correcta, con otra y con una en blanco. Un modelo que ignora la"
        " imagen obtiene lo mismo las tres veces.",
        "Richtige Antworten mit dem richtigen Bild, mit einem anderen und mit einem leeren. Ein"
        " Modell, das nicht hinsieht, erreicht dreimal dasselbe.",
        "分别用正确图片、别的图片和空白图片时的正确率。忽略图片的模型三次得分相同。",
    ),
    "right": ("right picture", "imagen correcta", "richtiges Bild", "正确图片"),
    "swapped": ("another picture", "otra imagen", "anderes Bild", "别的图片"),
    "blank": ("blank picture", "imagen en blanco", "leeres Bild", "空白图片"),
    "points_apart": (
        "{points} points apart",
        "{points} puntos de diferencia",
        "{points} Punkte Abstand",
        "相差 {points} 个百分点",
    ),
    "loss": ("Loss", "Pérdida", "Verlust", "损失"),
    "learning_rate": ("Learning rate", "Tasa de aprendizaje", "Lernrate", "学习率"),
    "gradient_norm": ("Gradient norm", "Norma del gradiente", "Gradientennorm", "梯度范数"),
    "right_answers": (
        "Right answers, %",
        "Aciertos, %",
        "Richtige Antworten, %",
        "正确率，%",
    ),
}
TEXTS: dict[str, dict[str, str]] = {
    key: dict(zip(_ORDER, row, strict=True)) for key, row in _TABLE.items()
}


def text(key: str, language: str, **values: object) -> str:
    """The text called `key`; {names} in it are filled from `values`. A language without a table
    gets English; an unknown key is a mistake in the program (KeyError)."""
    row = TEXTS[key]
    return row.get(language, row[DEFAULT]).format(**values)


def best_language(accepted: str | None) -> str:
    """The interface language that an Accept-Language header likes best (RFC 9110, 12.5.4)."""
    wanted = []
    for place, item in enumerate((accepted or "")[:1000].split(",")):
        name, _, weight = item.strip().partition(";")
        matched = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight) if weight else None
        if weight and matched is None:
            continue
        wanted.append((-(float(matched[1]) if matched else 1.0), place, name.split("-")[0].lower()))
    return next(
        (name for weight, _, name in sorted(wanted) if weight and name in LANGUAGES), DEFAULT
    )
