"""The app's theme and CSS. No font or file is fetched from elsewhere."""

import gradio as gr


THEME = gr.themes.Default(
    primary_hue="orange",
    neutral_hue="stone",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50",
    block_border_width="1px",
    block_radius="*radius_lg",
    block_shadow="0 1px 3px rgb(0 0 0 / 0.05)",
    block_title_text_weight="500",
    button_large_radius="*radius_lg",
    button_secondary_background_fill="white",
    button_secondary_background_fill_dark="*neutral_700",
    button_secondary_border_color="*neutral_200",
    button_secondary_border_color_dark="*neutral_600",
    button_border_width="1px",
    button_primary_border_color="transparent",
    input_border_color_focus="*primary_400",
    input_shadow_focus="none",
    button_primary_background_fill="*primary_600",  # dark enough for white text
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_text_color="white",
)

# On a wide screen inputs are on the left and images on the right; on a narrow one images are below the buttons.
CSS = """
.gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto !important; }
.bench { display: grid !important; gap: 20px; align-items: start;
  grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); grid-template-rows: auto 1fr;
  grid-template-areas: "asks shows" "more shows"; }
.asks { grid-area: asks; } .shows { grid-area: shows; } .more { grid-area: more; }
.go { flex-wrap: nowrap !important; }
.go button { min-width: 0 !important; }
.go button:first-child { flex-grow: 3; }
.easel .grid-wrap { max-height: none !important; min-height: 0 !important; }
/* Of one height, whether empty or with one image or four and their captions, so that nothing moves. */
.easel .empty { aspect-ratio: 1; height: auto !important; min-height: 0 !important;
  box-sizing: content-box !important; padding-bottom: 22px; }
.easel .thumbnail-item { display: flex; flex-direction: column; height: auto !important; aspect-ratio: auto !important;
  border: none; border-radius: 0; box-shadow: none; background: none; overflow: visible; }
.easel .thumbnail-item img { width: 100%; height: auto !important; aspect-ratio: 1; background: white;
  border-radius: var(--radius-sm); }
.easel .caption-label { position: static; width: 100%; max-width: none; height: 22px; padding: 2px 0; border: none;
  background: none; text-align: center; font-size: var(--text-xs); color: var(--body-text-color-subdued); }
.below { align-items: center; flex-wrap: nowrap !important; min-height: 32px; }
.below .status { color: var(--body-text-color-subdued); flex-grow: 1; }
.below .share { flex-grow: 0; min-width: 96px !important; }
@media (max-width: 760px) {
  .gradio-container { padding: 8px !important; }
  .bench { grid-template-columns: minmax(0, 1fr); grid-template-areas: "asks" "shows" "more"; gap: 12px; }
}
"""
