"""Floor 4: recipes inferred from names, values or use, and proof that two models agree.

Glossary, in the order of the work:

- A *unit* is what one layer owns (weight, bias, statistics) under one path; a *leaf* is one of its tensors
  (`units`). A *concept* is what a word of a path means (`vocabulary`); a *role* is what a unit does beside its
  neighbours: query, gate, down (`roles`, `norms`).
- A *stack* is a number behind which layers are listed, a *tower* a stack with the units beside it. A *pairing* is two
  stacks that correspond, layer by layer (`stacks`). Their *placement* says which unit may go where (`placement`);
  layers and *copies* of the weights that only one side has stay open (`depths`, `weight_copies`).
- A *side* is all units of one checkpoint with what is known of each (`sides`). *Fusion* makes one unit of several where
  the other side has one (`fusion`). *Relations* are the ways from a shape to another (`shapes`).
- *Evidence* is what speaks for a pair of units (`evidence`, `index_evidence`), the *assignment* the pairs that together
  score most (`assignment`); an *agreement* is what most pairs say of the others (`agreement`). A *match* is all of
  this, with open *questions* (`matches`). *Shared tensors* are sources that several targets need (`shared_tensors`).
- A *move* is which tensors make which, with which axes (`moves`); an *assumption* is what a move takes on trust
  (`assumptions`, `neighbours`).
- An *atom* is a rule for moves of one kind (`atoms`, `index_relations`), a *draft* the fewest rules that say the same
  (`drafts`, `claims`); the *fallback* is a recipe key by key (`fallback`). A *reduction* leaves out layers that are
  alike (`reduction`).
- A *suggestion* is the recipe and what is known of it (`suggestion`, `suggesting`). It is made by names (`by_names`).
  By values (`by_values`, `equating`): a *map* gives which element of one tensor is which of another (`element_maps`);
  *slices* are distinguished by hashes that no order changes, and fill *wholes* (`slices`, `wholes`); *digits* are the
  axes that a map shows; *chunks* are blocks that go their own ways (`chunks`, `regrouping`, `recipe_stages`); a *view*
  is a tensor seen in another cut, where both sides cut what they share in their own ways (`views`). A
  *finding* is the moves that belong together; its *companions* stand beside its tensors (`findings`), its *siblings*
  are called alike but for numbers (`siblings`), and its *context* is which layers go together (`context`). By inputs:
  the *order of use* in a *forward pass*, then the *flow* of data through both models (`by_inputs`, `forward_pass`,
  `data_flow`, `by_data`). *Parity* is whether two models compute the same (`parity`).
"""
