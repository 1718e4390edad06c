// What CANN has and the stand-in has no body for: `label NAME` defines NAME as a call of cann_stand_in_missing("NAME").
// Labels are weak, so a function that has a body replaces its label.

.macro label name
  .section .rodata
9:
  .asciz "\name"
  .text
  .weak \name
  .type \name, %function
\name:
#if defined(__x86_64__)
  leaq 9b(%rip), %rdi
  jmp cann_stand_in_missing
#elif defined(__aarch64__)
  adrp x0, 9b
  add x0, x0, :lo12:9b
  b cann_stand_in_missing
#else
#error "CANN exists for x86_64 and aarch64"
#endif
.endm

.hidden cann_stand_in_missing
#include "labels.inc"
#include "nnopbase.inc"

.section .note.GNU-stack, "", %progbits
