"""LLaVA-NeXT: an image is an overview and a grid of tiles. In its sequence the overview comes first, then the rows of
the grid without their padding, a newline at the end of each."""

from __future__ import annotations

import torch

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.core.declarations import Backbone
from foveate.modeling.core.outputs import TokenProvenance, VisualTokens
from foveate.modeling.layers.crops import Crops
from foveate.modeling.layers.tiles import TileGrid, TileLayout, tile_grid_of


class LlavaNextBackboneMixin(AnyBackboneMixin):
    """On LLaVA-NeXT."""

    visual_inputs = ("pixel_values", "image_sizes")
    names_vision_model = True

    def _tile_grids(self, image_sizes: torch.Tensor) -> list[TileGrid]:
        """Of images of (height, width) pixels, (images, 2)."""
        return [tile_grid_of(self.config, size) for size in image_sizes.tolist()]

    def crop_lengths(self, images):
        return [(grid.patches_of_tiles(), grid.num_newlines) for grid in self._tile_grids(images["image_sizes"])]

    def patches_of(self, matrices, images):
        """The patches of all tiles, tile after tile, padding among them; a newline is none."""
        num_patches, device = self.config.num_patches, matrices[0].device
        layout = TileLayout(self._tile_grids(images["image_sizes"]), device)
        order = layout.order(torch.arange(num_patches, device=device).expand(layout.num_tiles, -1))
        found, first_tile = [], 0
        for grid, matrix, entries in zip(layout.grids, matrices, order.split([len(m[0]) for m in matrices])):
            weights = matrix.new_zeros(len(matrix), grid.num_tiles * num_patches)
            is_patch = entries < layout.num_tiles * num_patches
            weights[:, entries[is_patch] - first_tile * num_patches] = matrix[:, is_patch]
            found.append(weights)
            first_tile += grid.num_tiles
        return found

    def cut_images(self, images):
        """Every tile; padding is never selected, so that the number of tokens follows from the image's size."""
        pixel_values = images["pixel_values"]
        layout = TileLayout(self._tile_grids(images["image_sizes"]), pixel_values.device)
        tiles = pixel_values.flatten(0, 1)[layout.rows_of_tiles(pixel_values.shape[1])]
        return Crops(tiles, layout.image_of_tile, layout.is_image(), layout)

    def join_crops(self, crops, features, positions):
        """Tokens stand where they stood, in the rows of the grid; every row keeps the newline that ends it."""
        layout = crops.layout
        tokens = self.multi_modal_projector(features).flatten(0, 1)
        newlines = self.image_newline.to(tokens)[None].expand(layout.num_newlines, -1)
        lengths = [grid.num_tokens(positions.shape[1]) for grid in layout.grids]
        return VisualTokens(torch.cat([tokens, newlines])[layout.order(positions)], lengths)

    def join_provenance(self, crops, positions, weights, steps, role, role_names):
        """A newline is made of no patch."""
        layout = crops.layout
        (_, num_tokens), num_patches, found, first_tile = positions.shape, weights.shape[2], [], 0
        lengths = [grid.num_tokens(num_tokens) for grid in layout.grids]
        for grid, chosen in zip(layout.grids, layout.order(positions).split(lengths)):
            tiles = slice(first_tile, first_tile + grid.num_tiles)
            of_tiles = torch.block_diag(*weights[tiles])  # (tiles · M, tiles · patches)
            index = chosen - first_tile * num_tokens
            is_newline = chosen >= layout.num_tiles * num_tokens
            of_image = of_tiles[index.masked_fill(is_newline, 0)].masked_fill(is_newline[:, None], 0)
            roles = torch.full_like(index, role).masked_fill(is_newline, len(role_names) - 1)
            offsets = torch.arange(grid.num_tiles, device=index.device)[:, None] * num_patches
            of_steps = tuple((f"layer {layer}", (kept[tiles] + offsets).flatten()) for layer, kept in steps)
            found.append(TokenProvenance(of_image, roles, role_names, of_steps))
            first_tile += grid.num_tiles
        return found


BACKBONE = Backbone(model_type="llava_next", stem="LlavaNext", title="LLaVA-NeXT", mixin=LlavaNextBackboneMixin)
