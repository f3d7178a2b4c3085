# SPDX-License-Identifier: Apache-2.0
#
# From the VMM's entry to `bare_main` at CPL3.
#
# Two entries: `pvh_entry` (32 bits, paging off, EBX = hvm_start_info; Xen PVH) and
# `linux64_entry` (64 bits, paging on, RSI = boot_params; Linux 64-bit protocol).
#
# Some KVMs emulate all that runs at CPL0, a thousand times slower than CPL3. So this part is as
# short as it can be: page tables, GDT and TSS are laid out by the linker, nothing is computed here,
# and the IDT is filled in later, from CPL3. Selectors are the ones Linux uses. Ports are opened by
# the TSS's I/O permission map and not by IOPL 3, which such KVMs lose on the way.

.set COM1, 0x3f8
.set MSR_EFER, 0xc0000080
.set EFER_SCE_LME_NXE, 0x901
.set CR0_PE_MP_ET_NE_WP_PG, 0x80010033
.set CR4_PAE_OSFXSR_OSXMMEXCPT, 0x620
.set KERNEL_CS, 0x10
.set USER_DS, 0x2b
.set USER_CS, 0x33
.set TSS_SELECTOR, 0x40
.set RFLAGS, 0x2

# --- The note that offers the PVH entry ---

.section .note.pvh, "a", @note
.align 4
    .long 4                         # name size
    .long 8                         # descriptor size
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

# --- Entries ---

.section .boot, "ax"

.macro first_byte
    movw $COM1, %dx
    movb $10, %al
    outb %al, %dx
.endm

.code32
.globl pvh_entry
pvh_entry:
    first_byte
    lgdtl gdt_pointer
    movl $CR4_PAE_OSFXSR_OSXMMEXCPT, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    movl $EFER_SCE_LME_NXE, %eax
    xorl %edx, %edx
    wrmsr
    movl $CR0_PE_MP_ET_NE_WP_PG, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CS, $1f
.code64
1:
    movl $1, %edi
    movl %ebx, %esi
    jmp to_user

.globl linux64_entry
linux64_entry:
    first_byte
    lgdtq gdt_pointer(%rip)
    movl $CR4_PAE_OSFXSR_OSXMMEXCPT, %eax
    movq %rax, %cr4
    movl $pml4, %eax
    movq %rax, %cr3
    movl $MSR_EFER, %ecx
    movl $0xd01, %eax               # the same, with LMA, which is on already
    xorl %edx, %edx
    wrmsr
    movl $CR0_PE_MP_ET_NE_WP_PG, %eax
    movq %rax, %cr0
    xorl %edi, %edi

to_user:
    lidtq idt_pointer(%rip)
    movl $TSS_SELECTOR, %eax
    ltr %ax
    movl $ring0_stack_top, %esp
    pushq $USER_DS
    pushq $stack_top
    pushq $RFLAGS
    pushq $USER_CS
    pushq $user_entry
    iretq

user_entry:
    xorl %ebp, %ebp
    call bare_main
    ud2

# --- Faults: save the frame and go on at CPL3 in `bare_fault` ---

fault_common:                       # stack: vector, error code, RIP, CS, RFLAGS, RSP, SS
    cmpq $0, ring0_call(%rip)
    jne 1f
    popq fault_record(%rip)
    popq fault_record + 8(%rip)
    popq fault_record + 16(%rip)
    popq fault_record + 24(%rip)
    popq fault_record + 32(%rip)
    popq fault_record + 40(%rip)
    popq fault_record + 48(%rip)
    movq %cr2, %rax
    movq %rax, fault_record + 56(%rip)
    movl $ring0_stack_top, %esp
    pushq $USER_DS
    pushq $stack_top - 8
    pushq $RFLAGS
    pushq $USER_CS
    pushq $bare_fault
    iretq
1:  jmp *ring0_call(%rip)           # asked for by `ring0::call`: there is no way back

.align 16
.globl fault_entries
fault_entries:
.set vector, 0
.rept 32
    .align 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    pushq $0                        # no error code from the processor
    .endif
    pushq $vector
    jmp fault_common
    .set vector, vector + 1
.endr

# --- What `ring0::call` can run at CPL0 ---

.globl ring0_hlt, ring0_int3, ring0_popcnt, ring0_fetch_mmio
ring0_hlt:
    cli
    hlt
    jmp ring0_hlt
ring0_int3:
    int3
    ud2
ring0_popcnt:
    popcntq %rax, %rax
    jmp ring0_hlt
ring0_fetch_mmio:                   # no memory is there: nothing can run this, on any KVM
    movl $0xd0000000, %eax
    jmp *%rax

# --- Tables ---

.section .tables, "aw"

# Identity map of the first 4 GiB in 2 MiB pages, user-accessible, writable, accessed and dirty.
# `memory::map_high` adds page directories for memory above.
.align 4096
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
.align 4096
.globl pdpt
pdpt:
    .quad page_directories + 0x27
    .quad page_directories + 0x1027
    .quad page_directories + 0x2027
    .quad page_directories + 0x3027
    .fill 508, 8, 0
.align 4096
page_directories:
.set page, 0
.rept 2048
    .quad (page << 21) + 0xe7
    .set page, page + 1
.endr

.align 16
gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff        # 0x10 kernel code, 64 bits
    .quad 0x00cf93000000ffff        # 0x18 kernel data
    .quad 0x00cffb000000ffff        # 0x20 user code, 32 bits
    .quad 0x00cff3000000ffff        # 0x28 user data
    .quad 0x00affb000000ffff        # 0x30 user code, 64 bits
    .quad 0
    .quad tss_descriptor_low        # 0x40
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

.align 16
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

.align 16
.globl tss, tss_end
tss:
    .long 0
    .quad ring0_stack_top           # RSP0
    .fill 90, 1, 0
    .word 104                       # offset of the I/O permission map
    .fill 0x1000 / 8, 1, 0          # ports 0 to 0xfff are open
    .byte 0xff
tss_end:

.align 8
.globl fault_record
fault_record:
    .fill 8, 8, 0
.globl ring0_call
ring0_call:
    .quad 0

.section .bss
.align 4096
.globl idt
idt:
    .skip 4096
    .skip 4096
ring0_stack_top:
    .skip 256 * 1024
stack_top:
