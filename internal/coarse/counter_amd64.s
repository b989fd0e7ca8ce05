#include "textflag.h"

// func counter() uint64
//
// RDTSC is not ordered with the instructions around it. What that may shift, the length
// of the reorder window, is five orders of magnitude below Window.
TEXT ·counter(SB), NOSPLIT, $0-8
	RDTSC
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET
